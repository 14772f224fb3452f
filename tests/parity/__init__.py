"""Parity with torch.save and torch.load: what is the same, and what differs."""
