"""UniTok's unified model: one language model answers questions about images and generates them."""
