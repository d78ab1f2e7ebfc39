"""What a run survives: being told to stop, steps that are not finite, and the account of what that costs."""
