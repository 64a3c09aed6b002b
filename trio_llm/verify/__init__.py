"""A checkpoint compared with transformers on this machine: what the tests do, for anybody's model."""
