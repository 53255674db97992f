//! Instruction to prompt ids.
//!
//! in   what the robot is asked to do, such as `pick up the cup`
//! out  `[n]` ids: BOS, the filled template, and the suffix that the model was trained to see
//!
//! ref: openvla `vla-scripts/deploy.py` `get_openvla_prompt`, and `modeling_prismatic.py`
//! `OpenVLAForActionPrediction.predict_action`

use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Template of `openvla-7b` and of models fine-tuned from it.
pub const OPENVLA: &str = "In: What action should the robot take to {instruction}?\nOut:";

/// Template of the Vicuna-based `openvla-v01-7b`.
pub const V01: &str = "A chat between a curious user and an artificial intelligence assistant. \
    The assistant gives helpful, detailed, and polite answers to the user's questions. \
    USER: What action should the robot take to {instruction}? ASSISTANT:";

/// Where the instruction goes.
const PLACE: &str = "{instruction}";

/// How a model wants its instructions wrapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text around the instruction; holds `{instruction}` exactly once.
    pub template: String,
    /// Id that ends every prompt: that of `"▁"`, 29871 in Llama-2's vocabulary.
    pub suffix: u32,
}

impl Prompt {
    /// Checks the template.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] unless the template holds `{instruction}` exactly once: without it the
    /// robot would move the same way whatever it is asked.
    pub fn new(template: String, suffix: u32) -> Result<Self> {
        match template.matches(PLACE).count() {
            1 => Ok(Self { template, suffix }),
            n => Err(Error::Model {
                why: format!("the prompt template holds `{PLACE}` {n} times, wanted once"),
            }),
        }
    }

    /// The template filled with the instruction, in lower case and otherwise as it was given.
    pub fn text(&self, instruction: &str) -> String {
        // One replacement, so a `{instruction}` inside the instruction stays what it is.
        self.template.replacen(PLACE, &instruction.to_lowercase(), 1)
    }

    /// The prompt's ids, from BOS to the suffix.
    ///
    /// # Errors
    ///
    /// Those of [`Tokenizer::encode`].
    pub fn ids(&self, tokenizer: &Tokenizer, instruction: &str) -> Result<Vec<u32>> {
        let mut ids = tokenizer.encode(&self.text(instruction))?;
        // ref: `predict_action` appends id 29871. The model was trained on `Out: ` and then motion,
        // but the template ends at the colon; without the id the first motion token is wrong. Never
        // twice: a template that ends in a space already ends in this id.
        if ids.last() != Some(&self.suffix) {
            ids.push(self.suffix);
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tiny;

    const SUFFIX: u32 = 6;

    #[test]
    fn only_the_case_of_an_instruction_changes() {
        let prompt = Prompt::new(OPENVLA.into(), SUFFIX).unwrap();
        assert_eq!(
            prompt.text("  Pick UP the {instruction}. "),
            "In: What action should the robot take to   pick up the {instruction}. ?\nOut:"
        );
        // Python's `lower` too knows the final sigma and İ's combining dot.
        assert!(prompt.text("ΟΔΟΣ İ").contains("οδος i\u{307}?"));
    }

    #[test]
    fn v01_has_single_spaces_where_its_source_line_breaks() {
        let prompt = Prompt::new(V01.into(), SUFFIX).unwrap();
        let text = prompt.text("go");
        assert!(
            text.contains("assistant. The") && text.contains("questions. USER: What"),
            "{text}"
        );
        assert!(text.ends_with("take to go? ASSISTANT:") && !text.contains("  "), "{text}");
    }

    #[test]
    fn the_suffix_ends_a_prompt_once() {
        let tokenizer = Tokenizer::new(&tiny()).unwrap();
        let prompt = Prompt::new("{instruction}".into(), SUFFIX).unwrap();
        assert_eq!(prompt.ids(&tokenizer, "Cup").unwrap(), [1, 12, SUFFIX]);
        assert_eq!(prompt.ids(&tokenizer, "cup ").unwrap(), [1, 12, SUFFIX]);
        assert_eq!(prompt.ids(&tokenizer, "").unwrap(), [1, SUFFIX]);
    }

    #[test]
    fn a_template_holds_its_place_exactly_once() {
        for (template, n) in [("no place", 0), ("{instruction} {instruction}", 2)] {
            let error = Prompt::new(template.into(), SUFFIX).unwrap_err().to_string();
            assert!(error.contains(&format!("`{{instruction}}` {n} times")), "{error}");
        }
    }
}
