"""Operations with hardware kernels: one folder each, a readable reference beside them."""
