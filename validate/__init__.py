"""Measure: does an artifact compute what PyTorch computes?"""
