"""Layers from other frameworks. None of them is imported: their objects are read by attribute.

=================  ===============================================================================
`arrays`           a tensor, or whatever else holds numbers, as a NumPy array
`from_torch`       torch's BatchNorm modules
`from_keras`       Keras's BatchNormalization layers
`from_onnx`        ONNX's BatchNormalization nodes, and the initializers of a graph
`assembling`       a layer of given numbers: what the three have in common
=================  ===============================================================================
"""
