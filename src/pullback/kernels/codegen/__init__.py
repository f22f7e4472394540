"""Renderers of the scalar program: eager torch, LLVM, Triton."""
