"""What the combinations looked like."""
