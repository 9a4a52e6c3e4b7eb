"""Time: what attention and decoding cost, here and in other libraries."""
