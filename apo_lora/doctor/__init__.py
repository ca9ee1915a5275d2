"""What this machine has, and whether it can train."""
