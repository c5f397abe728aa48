"""What is made of a model to run it elsewhere: ONNX, torch.export archives, real int8; and how fast each form is."""
