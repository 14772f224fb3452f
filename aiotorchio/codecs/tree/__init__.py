"""The tree codec: MessagePack, no pickle (SPEC.md section 6.1)."""
