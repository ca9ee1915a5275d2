"""What the product does and costs on a GPU, and what its peers cost; see README.md."""
