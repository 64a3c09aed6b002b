"""What the endpoints answer, as types: the formats build answers from them, and the OpenAPI document describes them."""
