"""What a machine does with a store and a step, stage by stage, beside other libraries on the same work."""
