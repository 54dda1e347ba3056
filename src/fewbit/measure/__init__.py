"""What was lost, saved and gained."""
