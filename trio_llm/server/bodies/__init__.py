"""Request bodies: bytes, then JSON, then a typed body, with unknown fields and size limits reported."""
