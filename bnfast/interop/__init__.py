"""Layers from other frameworks, and engines that spread a batch.

None of the frameworks is imported: their objects are read by attribute. `dask` and `mpi` import
theirs when they are imported themselves.

=================  ===============================================================================
`arrays`           a tensor, or whatever else holds numbers, as a NumPy array
`from_torch`       torch's BatchNorm modules
`from_keras`       Keras's BatchNormalization layers
`from_onnx`        ONNX's BatchNormalization nodes, and the initializers of a graph
`assembling`       a layer of given numbers: what these three have in common
`dask`             moments, batch norm and recalibration of dask arrays
`mpi`              layers that normalise what is spread over MPI ranks as one batch
`onnx`             batch norm for ONNX's reference evaluator; this one imports onnx. Its parts are
                   `onnx_nodes`, `onnx_operator`, `onnx_fusion` and `onnx_profile`
=================  ===============================================================================
"""
