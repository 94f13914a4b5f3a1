"""What changes or steers a trained model: adapters, new words, ControlNets, distillation."""
