"""Other frameworks: layers made of theirs, without importing them, and ONNX's evaluator.

=================  ===============================================================================
`arrays`           a tensor, or whatever else holds numbers, as a NumPy array
`from_torch`       torch's BatchNorm modules
`from_keras`       Keras's BatchNormalization layers
`from_onnx`        ONNX's BatchNormalization nodes, and the initializers of a graph
`assembling`       a layer of given numbers: what the three have in common
`onnx`             batch norm for ONNX's reference evaluator; this one imports onnx. Its parts are
                   `onnx_nodes`, `onnx_operator`, `onnx_fusion` and `onnx_profile`
=================  ===============================================================================
"""
