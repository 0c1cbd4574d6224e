"""Who computes an op, and when: schemas, implementations, the choice between them, replay."""
