"""linops"""
