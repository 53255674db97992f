//! A client's message: its fields found by their names, and what is wrong with them said by name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::{Code, Error};
use crate::field::Field;

/// The names that fields have in messages of one kind.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Names of the image. The first is the one to use. None where images are named after cameras alone.
    pub image: &'static [&'static str],
    /// Whether images of wrist cameras are read: those with `wrist` in their names.
    pub wrists: bool,
    /// Whether images may be named after cameras, in a map `images` or as `images.NAME`.
    pub cameras: bool,
    /// Names of the instruction. The first is the one to use.
    pub instruction: &'static [&'static str],
    /// Names of what else is read.
    pub options: &'static [&'static str],
    /// What a message should be, and what is usually forgotten.
    pub hint: &'static str,
}

/// The fields of a message, not looked into yet.
#[derive(Debug)]
pub struct Message<'a> {
    schema: &'static Schema,
    images: Vec<Named<'a>>,
    /// Images that are named after cameras.
    cameras: Vec<Named<'a>>,
    /// Images of wrist cameras, in the order of the message.
    wrists: Vec<Named<'a>>,
    instructions: Vec<Named<'a>>,
    options: BTreeMap<String, Field<'a>>,
    /// Names that mean nothing here.
    others: Vec<String>,
}

/// A field and its name.
pub type Named<'a> = (String, Field<'a>);

/// Names that a sentence lists.
const LISTED: usize = 16;

impl<'a> Message<'a> {
    /// A message of JSON as [`crate::json::standard`] has it.
    ///
    /// # Errors
    /// [`Code::BadJson`], [`Code::BadRequest`].
    pub fn from_json(schema: &'static Schema, json: &'a [u8]) -> Result<Self, Error> {
        let mut from = serde_json::Deserializer::from_slice(json);
        let message = schema.deserialize(&mut from);
        let message = message.and_then(|message| from.end().map(|()| message));
        message.map_err(|why| {
            if why.is_data() {
                Error::bad_request(format!("the body cannot be read: {why}")).hint(schema.hint)
            } else {
                Error::new(Code::BadJson, format!("the body is not JSON: {why}"))
            }
        })
    }

    /// A message of msgpack.
    ///
    /// # Errors
    /// [`Code::BadRequest`].
    pub fn from_msgpack(schema: &'static Schema, frame: &'a [u8]) -> Result<Self, Error> {
        let message = schema.deserialize(&mut rmp_serde::Deserializer::from_read_ref(frame));
        let wrong = |why| format!("the frame cannot be read: {why}");
        message.map_err(|why| Error::bad_request(wrong(why)).hint(schema.hint))
    }

    /// The image.
    ///
    /// # Errors
    /// [`Code::BadRequest`] if there is none, or several and none has the name of the one to take.
    pub fn image(&mut self) -> Result<Named<'a>, Error> {
        let schema = self.schema;
        if self.images.is_empty() && self.cameras.len() > 1 {
            let there = list(self.cameras.iter().map(|(name, _)| name));
            let error = Error::bad_request(format!("there are several images: {there}"));
            let name = schema.image[0];
            return Err(error.hint(format!("send the one to act on as `{name}`")));
        }
        let named = if self.images.is_empty() { &mut self.cameras } else { &mut self.images };
        let named = std::mem::take(named);
        self.only(named, schema.image)
    }

    /// The images of all cameras but those of the wrist where these are read apart, in the order of the message.
    pub fn cameras(&mut self) -> Vec<Named<'a>> {
        std::mem::take(&mut self.cameras)
    }

    /// The images of the wrist cameras, in the order of the message: sorted by name they would be others.
    pub fn wrists(&mut self) -> Vec<Named<'a>> {
        std::mem::take(&mut self.wrists)
    }

    /// The instruction.
    ///
    /// # Errors
    /// [`Code::BadRequest`] if there is none, several, or something else than text.
    pub fn instruction(&mut self) -> Result<String, Error> {
        let instructions = std::mem::take(&mut self.instructions);
        let (name, field) = self.only(instructions, self.schema.instruction)?;
        field.text(&name).map_err(|error| error.hint(self.schema.hint))
    }

    /// The field of this name, by `read`, if it is there.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn option<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(Field<'a>, &str) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.options.remove(name).map(|field| read(field, name)).transpose()
    }

    fn only(&self, mut named: Vec<Named<'a>>, wanted: &[&str]) -> Result<Named<'a>, Error> {
        match (named.pop(), named.is_empty()) {
            (Some(named), true) => Ok(named),
            (Some((last, _)), false) => {
                let names = list(named.iter().map(|(name, _)| name).chain([&last]));
                let error = Error::bad_request(format!("{names} are the same field"));
                Err(error.hint(format!("send one of them, best `{}`", wanted[0])))
            }
            (None, _) => {
                let there = match list(&self.others) {
                    empty if empty.is_empty() => String::new(),
                    others => format!("; what is not read: {others}"),
                };
                let missing = format!("there is no `{}`{there}", wanted[0]);
                Err(Error::bad_request(missing).hint(self.schema.hint))
            }
        }
    }
}

fn list<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names = names.into_iter().take(LISTED);
    let short = names.map(|name| format!("`{}`", name.chars().take(64).collect::<String>()));
    short.collect::<Vec<_>>().join(", ")
}

impl<'de> DeserializeSeed<'de> for &'static Schema {
    type Value = Message<'de>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Message<'de>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &'static Schema {
    type Value = Message<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = self.image.first().unwrap_or(&"images");
        write!(f, "a map with `{image}` and `{}`", self.instruction[0])
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Message<'de>, A::Error> {
        let mut message = Message {
            schema: self,
            images: Vec::new(),
            cameras: Vec::new(),
            wrists: Vec::new(),
            instructions: Vec::new(),
            options: BTreeMap::new(),
            others: Vec::new(),
        };
        while let Some(Key(name)) = map.next_key()? {
            let is_one_of = |names: &[&str]| names.contains(&name.as_ref());
            let fields = if is_one_of(self.image) {
                &mut message.images
            } else if is_one_of(self.instruction) {
                &mut message.instructions
            } else if self.wrists && name.contains("wrist") {
                &mut message.wrists
            } else if self.cameras && is_camera(&name) {
                &mut message.cameras
            } else if self.cameras && name == "images" {
                let Cameras(cameras) = map.next_value()?;
                let is_wrist = |(name, _): &Named<'_>| self.wrists && name.contains("wrist");
                let (wrists, others): (Vec<_>, Vec<_>) = cameras.into_iter().partition(is_wrist);
                message.wrists.extend(wrists);
                message.cameras.extend(others);
                continue;
            } else if is_one_of(self.options) {
                if let Some(field) = map.next_value()? {
                    message.options.insert(name.into_owned(), field);
                }
                continue;
            } else {
                map.next_value::<IgnoredAny>()?;
                if message.others.len() < LISTED {
                    message.others.push(name.into_owned());
                }
                continue;
            };
            if let Some(field) = map.next_value()? {
                fields.push((name.into_owned(), field));
            }
        }
        Ok(message)
    }
}

/// As LeRobot and robots of their own name the images of cameras: `observation.images.top`.
fn is_camera(name: &str) -> bool {
    let name = name.strip_prefix("observation.").unwrap_or(name);
    let name = name.strip_prefix("observation/").unwrap_or(name);
    name.strip_prefix("images").is_some_and(|name| name.starts_with(['.', '/']))
}

/// The arrays of a map, named after cameras.
struct Cameras<'a>(Vec<Named<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Cameras<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Cameras<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`images` as a map of arrays, each named after its camera")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Cameras<'de>, A::Error> {
                let mut cameras = Vec::new();
                while let Some((Key(name), field)) = map.next_entry()? {
                    if matches!(field, Field::Array(_) | Field::Picture(_)) {
                        cameras.push((format!("images.{name}"), field));
                    }
                }
                Ok(Cameras(cameras))
            }
        }
        from.deserialize_map(Map)
    }
}

/// A name: text, or bytes as old msgpack has it.
struct Key<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match Field::deserialize(from)? {
            Field::Text(name) => Ok(Self(name)),
            Field::Bytes(name) => Ok(Self(String::from_utf8_lossy(&name).into_owned().into())),
            Field::Integer(name) => Ok(Self(name.to_string().into())),
            _ => Err(D::Error::custom("a name of a field is not text")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;
    use crate::numpy::{Msgpack, Ndarray};

    static SCHEMA: Schema = OF_TESTS;
    const OF_TESTS: Schema = Schema {
        image: &["observation/image", "image"],
        wrists: false,
        cameras: true,
        instruction: &["prompt", "instruction"],
        options: &["seq", "timestamp"],
        hint: "as it should be",
    };

    #[derive(Serialize)]
    #[serde(untagged)]
    enum Value {
        Text(&'static str),
        Number(u64),
        Flag(bool),
        Nothing(()),
        Array(Msgpack<'static>),
        Map(BTreeMap<&'static str, Value>),
    }
    use Value::{Flag, Map, Nothing, Number, Text};

    fn array(dtype: &'static str, shape: &[usize], data: &'static [u8]) -> Value {
        Value::Array(Msgpack(Ndarray {
            dtype: dtype.into(),
            shape: shape.into(),
            data: data.into(),
        }))
    }

    fn pixel() -> Value {
        array("|u1", &[1, 1, 3], b"rgb")
    }

    fn frame<const N: usize>(fields: [(&'static str, Value); N]) -> Vec<u8> {
        rmp_serde::to_vec_named(&BTreeMap::from(fields)).unwrap()
    }

    #[test]
    fn scalars_and_arrays_of_numpy_are_what_they_hold() {
        let scalar = |data| {
            BTreeMap::from([("__npgeneric__", Flag(true)), ("data", data), ("dtype", Text("<i8"))])
        };
        let frame = frame([
            ("image", pixel()),
            ("prompt", array("<U2", &[], b"g\0\0\0o\0\0\0")),
            ("seq", Map(scalar(Number(7)))),
            ("timestamp", array("<f4", &[1], b"\0\0\0\x3f")),
        ]);
        let mut message = Message::from_msgpack(&SCHEMA, &frame).unwrap();
        assert_eq!(message.instruction().unwrap(), "go");
        assert_eq!(message.option("seq", Field::integer).unwrap(), Some(7));
        assert_eq!(message.option("timestamp", Field::float).unwrap(), Some(0.5));
        assert_eq!(message.option("deadline_ms", Field::integer).unwrap(), None);
    }

    #[test]
    fn the_image_is_found_by_its_name_or_because_it_is_the_only_one() {
        let name = |frame: Vec<u8>| {
            let image = Message::from_msgpack(&SCHEMA, &frame).unwrap().image();
            image.map(|(name, field)| (name, field.array("").unwrap().data.into_owned()))
        };
        let found = |name: &str| (name.to_owned(), b"rgb".to_vec());
        let cameras = |names: &[&'static str]| {
            Map(names.iter().map(|name| (*name, pixel())).chain([("state", Number(1))]).collect())
        };
        assert_eq!(name(frame([("image", pixel())])).unwrap(), found("image"));
        let nothing = [("image", pixel()), ("observation/image", Nothing(()))];
        assert_eq!(name(frame(nothing)).unwrap(), found("image"));
        let one = frame([("images", cameras(&["cam_high"]))]);
        assert_eq!(name(one).unwrap(), found("images.cam_high"));
        for flat in ["images.top", "images/top", "observation.images.top", "observation/images/top"]
        {
            assert_eq!(name(frame([(flat, pixel())])).unwrap(), found(flat));
        }
        let named = frame([("image", pixel()), ("images", cameras(&["left", "right"]))]);
        assert_eq!(name(named).unwrap(), found("image"));

        let several =
            name(frame([("images", cameras(&["left", "right"])), ("images.top", pixel())]));
        let several = several.unwrap_err();
        for camera in ["`images.left`", "`images.right`", "`images.top`"] {
            assert!(several.message.contains(camera), "{several}");
        }
        assert!(several.hint.unwrap().contains("as `observation/image`"));
        let both = name(frame([("image", pixel()), ("observation/image", pixel())])).unwrap_err();
        assert!(both.message.contains("`image`, `observation/image` are the same"), "{both}");
        let none = name(frame([("picture", pixel()), ("prompt", Text("x"))])).unwrap_err();
        assert_eq!(none.message, "there is no `observation/image`; what is not read: `picture`");
    }

    #[test]
    fn wrists_keep_the_order_of_the_message() {
        static WITH_WRISTS: Schema = Schema { wrists: true, cameras: true, ..OF_TESTS };
        let json = br#"{"right_wrist": 1, "image": 2, "images": {"b_wrist": [], "a_wrist": {"__numpy__": "", "dtype": "|u1",
            "shape": [0]}}, "left_wrist": 3, "prompt": "x"}"#;
        let names = |schema| {
            let wrists = Message::from_json(schema, json).unwrap().wrists();
            wrists.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(&WITH_WRISTS), ["right_wrist", "images.a_wrist", "left_wrist"]);
        assert!(names(&SCHEMA).is_empty());
    }

    #[test]
    fn instructions_are_one_text() {
        let instruction = |frame: Vec<u8>| {
            Message::from_msgpack(&SCHEMA, &frame).unwrap().instruction().map_err(|why| why.message)
        };
        assert_eq!(instruction(frame([("instruction", Text("go"))])).unwrap(), "go");
        let both = instruction(frame([("prompt", Text("go")), ("instruction", Text("stop"))]));
        assert!(both.unwrap_err().contains("`instruction`, `prompt` are the same field"));
        assert!(instruction(frame([])).unwrap_err().contains("there is no `prompt`"));
        let number = instruction(frame([("prompt", Number(1))])).unwrap_err();
        assert_eq!(number, "`prompt` is a whole number; text is wanted");
    }

    #[test]
    fn names_are_listed_only_so_far() {
        let names: BTreeMap<String, u8> =
            (0..1000).map(|i| (format!("{}{i:4}", "x".repeat(500)), 0)).collect();
        let frame = rmp_serde::to_vec_named(&names).unwrap();
        let error = Message::from_msgpack(&SCHEMA, &frame).unwrap().image().unwrap_err();
        assert!(error.message.len() < 2000, "{error}");
    }
}
