"""Sparse Jacobians and Hessians by colouring."""
