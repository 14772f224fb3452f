"""Parity with torch.save and torch.load: common behaviour and differences."""
