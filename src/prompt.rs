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

    /// What is probably a mistake about an instruction. The prompt is filled with it all the same,
    /// since the reference does so.
    pub fn doubt(&self, instruction: &str) -> Option<&'static str> {
        let instruction = plain(instruction);
        let (before, after) = self.template.split_once(PLACE).unwrap_or_default();
        let (before, after) = (plain(before), plain(after));
        // In `USER: What action should the robot take to` it is the last sentence that people copy.
        let lead = before.rsplit([':', '.', '?', '!']).next().unwrap_or_default().trim();
        let is_phrase = lead.split(' ').count() >= PHRASE;
        if instruction.is_empty() {
            Some("the instruction is empty; the motion follows from the image alone")
        } else if !before.is_empty() && instruction.starts_with(&before)
            || is_phrase && instruction.contains(lead)
            || after.contains(char::is_alphabetic) && instruction.ends_with(&after)
        {
            Some("the instruction holds the whole prompt; give only the task")
        } else if instruction.contains('_') && !instruction.contains(' ') {
            Some("the instruction has underscores in place of spaces")
        } else {
            None
        }
    }
}

/// Words that make a phrase which no task holds by chance.
const PHRASE: usize = 4;

/// A text in lower case, with one space between words.
fn plain(text: &str) -> String {
    text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ")
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
    fn probable_mistakes_are_doubted() {
        let doubt = |template: &str, instruction: &str| {
            Prompt::new(template.into(), SUFFIX).unwrap().doubt(instruction).unwrap_or("sound")
        };
        for template in [OPENVLA, V01, "Task: {instruction}\nAction:", PLACE] {
            let whole = Prompt::new(template.into(), SUFFIX).unwrap().text("put it down");
            let is_bare = template == PLACE;
            for whole in [whole.clone(), whole.to_uppercase(), format!("\n {whole} \n")] {
                assert_eq!(doubt(template, &whole).contains("whole prompt"), !is_bare, "{whole}");
            }
            assert!(doubt(template, " \n").contains("empty"));
            assert!(doubt(template, "put_it_down\n").contains("underscores"));
            for sound in ["put it down", "Take the robot out?", "press the key a_b", "go"] {
                assert_eq!(doubt(template, sound), "sound", "{template}");
            }
        }
        for part in [
            "What action should the robot take to put it down?",
            "in:  what action should the robot\ntake to put it down?",
            "USER: What action should the robot take to put it down? ASSISTANT:",
            "put it down?\nOut:",
        ] {
            assert!(doubt(OPENVLA, part).contains("whole prompt"), "{part}");
        }
    }

    #[test]
    fn a_template_holds_its_place_exactly_once() {
        for (template, n) in [("no place", 0), ("{instruction} {instruction}", 2)] {
            let error = Prompt::new(template.into(), SUFFIX).unwrap_err().to_string();
            assert!(error.contains(&format!("`{{instruction}}` {n} times")), "{error}");
        }
    }
}
