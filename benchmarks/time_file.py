"""What any user would do to time a model file: ten lines of plain onnxruntime, one thread."""

import sys
import time

import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {"input": np.random.rand(1, *session.get_inputs()[0].shape[1:]).astype(np.float32)}
times = []
for _ in range(600):
    start = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - start)
print(np.median(times[100:]) * 1000)
