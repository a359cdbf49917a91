"""The bundled tiny models and how to build them."""
