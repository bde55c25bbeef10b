"""What a training needs of a machine."""
