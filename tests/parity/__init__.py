"""What whoever comes from torch.save and torch.load finds here."""
