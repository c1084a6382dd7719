"""What can be told of the CUDA kernels besides times: the machine code in a wheel, and all that a first GPU is for."""
