"""What a model of any class consists of: its shape, and layers as functions of tensors."""
