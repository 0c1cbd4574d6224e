"""Dispatch of the ops: schemas, implementations, the choice between them, replay."""
