"""Importers of checkpoint formats other than Hugging Face's; one module per source format."""
