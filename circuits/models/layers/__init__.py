"""Layers as functions of tensors, made from the weights of a model of any class."""
