"""Two steps of GRPO in TRL with an exported reward: in an environment of its own (CONTRIBUTING.md)."""

import pytest
from fixtures.tiny import CHAT, write_checkpoint
from reward_models import model_on

from jarm.export.functions import trl_function
from jarm.export.sequence_classification import write_sequence_classification


@pytest.mark.trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["function", "sequence-classification"])
def test_grpo_takes_two_steps(tmp_path, form):
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = write_checkpoint(tmp_path / "llama", "llama", chat=CHAT)
    model = model_on(folder, head="mlp:6" if form == "function" else "linear")
    reward = trl_function(model, str(folder))
    if form != "function":
        write_sequence_classification(model, tmp_path / "out", str(folder))
        reward = str(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, **small))
    data = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}] * 8)
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "grpo"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.GRPOTrainer(policy, reward, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 2
    assert all(row["reward"] == row["reward"] for row in logged)  # no NaN
    if form == "function":
        assert all(row["rewards/jarm/mean"] == pytest.approx(row["reward"]) for row in logged)
        assert any("jarm/deviation" in name for name in logged[0])
