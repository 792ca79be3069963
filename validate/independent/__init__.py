"""Does an implementation that shares no code with this one compute the same from the checkpoint's own files?"""
