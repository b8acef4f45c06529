"""What the recipes run: the stages of each in order."""
