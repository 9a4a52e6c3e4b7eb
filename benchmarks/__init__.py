"""What attention, decoding and training cost, in time and memory, here and in other libraries."""
