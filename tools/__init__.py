"""What is not the product at run time: the kernel lab, the PTX simulator, the training of the demo model."""
