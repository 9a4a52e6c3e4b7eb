"""Time: what attention costs, here and in other libraries, on named shapes."""
