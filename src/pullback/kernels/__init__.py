"""Sums over all pairs, sum_j F(x_i, y_j), without the matrix of pairs."""
