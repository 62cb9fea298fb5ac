"""What a decoder keeps of its past."""
