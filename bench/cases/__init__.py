"""What a step must move and launch, by arithmetic."""
