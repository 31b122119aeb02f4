"""Other tools' files: EAP-IG's circuits and Neuronpedia's attribution graphs."""
