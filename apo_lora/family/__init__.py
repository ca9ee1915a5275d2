"""What is special about a family of models: one record each, which everything else asks."""
