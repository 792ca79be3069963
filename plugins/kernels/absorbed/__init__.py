"""MlaQuery and MlaValue: what stands before and after decode's attention, one launch each."""
