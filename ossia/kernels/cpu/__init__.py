"""C for a CPU, compiled on first use (`build.py`): the passes of training (`passes`), and decoding (`native.py`).

Each has its torch reference, in `ossia/ops` and `ossia/engine`.
"""
