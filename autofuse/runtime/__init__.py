"""What runs when a fused op is called."""
