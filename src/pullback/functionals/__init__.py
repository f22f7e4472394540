"""functionals"""
