//! The protocol for everyone else.

mod common;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{ACTION, Server, png};
use serde_json::json;

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

fn form(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, bytes) in parts {
        let head = format!("--cut\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        body.extend([head.as_bytes(), bytes, b"\r\n"].concat());
    }
    [body, b"--cut--\r\n".to_vec()].concat()
}

#[test]
fn a_picture_in_json_gets_an_object() {
    let server = Server::start(&[]);
    let body = json!({
        "image": STANDARD.encode(png(5, 4)), "instruction": "put it there",
        "unnorm_key": "bridge_orig",
    });
    let headers = [&JSON[..], &[("x-seq", "12")]].concat();
    let got = server.post("/v1/act", &headers, body.to_string().as_bytes());
    let json = got.json();
    assert_eq!(got.status, 200, "{json}");
    assert_eq!(json["action"], json!(ACTION));
    assert_eq!(json["tokens"], json!(vec![31_872; 7]));
    assert_eq!(json["ranges"][0], json!([-0.1, 0.1]));
    assert_eq!(json["ranges"][6], json!([-1.0, 1.0]), "the gripper is not scaled");
    assert_eq!((&json["seq"], &json["all_actions"]), (&json!(12), &json!(true)));
    assert_eq!(json["safety"], json!({ "clamped": [], "limited": [] }));
    assert!(json.get("warning").is_none());
    for stage in ["queue", "preprocess", "vision", "projector", "prefill", "decode", "step"] {
        assert!(json["timing_ms"][stage].is_number(), "{stage}");
    }
    let seen = server.seen();
    assert_eq!((seen.image.dimensions(), seen.instruction.as_str()), ((5, 4), "put it there"));
}

#[test]
fn the_picture_may_be_written_as_browsers_and_shells_do() {
    let server = Server::start(&[]);
    let plain = STANDARD.encode(png(40, 40));
    let lines: Vec<&str> =
        plain.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
    for image in [
        format!("data:image/png;base64,{plain}"),
        lines.join("\n") + "\n",
        plain.replace('+', "-").replace('/', "_"),
    ] {
        let body = json!({ "image": image, "instruction": "x" }).to_string();
        let body = body.replace('}', r#", "state": [NaN, Infinity]}"#);
        let got = server.post("/v1/act", &JSON, format!("\u{feff}{body}").as_bytes());
        assert_eq!(got.status, 200, "{}", got.text());
        assert_eq!(server.seen().image.dimensions(), (40, 40));
    }
    for image in [json!([[[0, 1, 2]]]), json!({ "__numpy__": "AAEC" }), json!("b'iVBO'")] {
        let body = json!({ "image": image, "instruction": "x" }).to_string();
        let error = server.post("/v1/act", &JSON, body.as_bytes()).assert_error(400, "bad_request");
        assert!(error["message"].as_str().unwrap().starts_with("`image` is "), "{error}");
        assert!(error["hint"].as_str().unwrap().contains("base64.b64encode"), "{error}");
    }
}

#[test]
fn a_form_with_a_file_is_the_same() {
    let server = Server::start(&[]);
    let headers = [("content-type", "multipart/form-data; boundary=cut")];
    let file = png(3, 9);
    let parts: [(&str, &[u8]); 4] = [
        ("image", &file),
        ("instruction", b"be unsure"),
        ("unnorm_key", b"fractal20220817_data"),
        ("other", b"left alone"),
    ];
    let json = server.post("/v1/act", &headers, &form(&parts)).json();
    assert_eq!(json["unnorm_key"], "fractal20220817_data", "{json}");
    assert!(json["warning"].as_str().unwrap().contains("trained for"));
    assert_eq!(server.seen().image.dimensions(), (3, 9));

    let error =
        server.post("/v1/act", &headers, &form(&parts[..1])).assert_error(400, "bad_request");
    assert!(error["message"].as_str().unwrap().contains("instruction"), "{error}");
    server.post("/v1/act", &headers, b"--cut\r\n").assert_error(400, "bad_request");
    let none = [("content-type", "multipart/form-data")];
    server.post("/v1/act", &none, b"x").assert_error(400, "bad_request");
}

#[test]
fn what_cannot_be_used_is_named() {
    let server = Server::start(&["--max-pixels", "100"]);
    let post = |body: String| server.post("/v1/act", &JSON, body.as_bytes());
    let image = |bytes: &[u8]| {
        post(json!({ "image": STANDARD.encode(bytes), "instruction": "x" }).to_string())
    };
    let large = image(&png(11, 10)).assert_error(422, "bad_image");
    assert!(large["message"].as_str().unwrap().contains("11 x 10"), "{large}");
    let cut = png(9, 9);
    image(&cut[..cut.len() / 2]).assert_error(422, "bad_image");
    image(b"GIF89a").assert_error(422, "bad_image");
    image(b"").assert_error(422, "bad_image");
    post("[1]".into()).assert_error(400, "bad_request");
    post("{".into()).assert_error(400, "bad_json");
    post(json!({ "image": "?", "instruction": "x" }).to_string()).assert_error(400, "bad_request");
    let long = json!({ "image": STANDARD.encode(png(2, 2)), "instruction": "x".repeat(9000) });
    post(long.to_string()).assert_error(400, "instruction_too_long");
    let text = server.post("/v1/act", &[("content-type", "text/plain")], b"{}");
    text.assert_error(415, "unsupported_media_type");
}

/// Larger than what HTTP libraries take unless told.
#[test]
fn a_camera_s_whole_picture_is_taken_in_every_form() {
    let server = Server::start(&[]);
    let (side, n) = (1024_u32, 1024 * 1024 * 3);
    let noise: Vec<u8> =
        (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let image = openvla::image::RgbImage::from_raw(side, side, noise.clone()).unwrap();
    let mut file = std::io::Cursor::new(Vec::new());
    image.write_to(&mut file, openvla::image::ImageFormat::Png).unwrap();
    let file = file.into_inner();
    assert!(file.len() > 3 << 20, "{}", file.len());
    let body = json!({ "image": STANDARD.encode(&file), "instruction": "x" }).to_string();
    let multipart = [("content-type", "multipart/form-data; boundary=cut")];
    let array =
        json!({ "__numpy__": STANDARD.encode(&noise), "dtype": "|u1", "shape": [side, side, 3] });
    let array = json!({ "image": array, "instruction": "x" }).to_string();
    for got in [
        server.post("/v1/act", &JSON, body.as_bytes()),
        server.post("/v1/act", &multipart, &form(&[("image", &file), ("instruction", b"x")])),
        server.post("/act", &JSON, array.as_bytes()),
    ] {
        assert_eq!(got.status, 200, "{}", got.text());
        assert_eq!(server.seen().image, image);
    }
}

/// A picture whose header promises far more than may be decoded is refused by its header.
#[test]
fn a_bomb_is_refused_before_its_pixels_are_read() {
    let server = Server::start(&[]);
    let mut bomb = png(2, 2);
    bomb[16..24].copy_from_slice(&[0, 0, 0x3f, 0xff, 0, 0, 0x3f, 0xff]); // 16383 x 16383
    let body = json!({ "image": STANDARD.encode(&bomb), "instruction": "x" }).to_string();
    let error = server.post("/v1/act", &JSON, body.as_bytes()).assert_error(422, "bad_image");
    assert!(error["message"].as_str().unwrap().contains("16383 x 16383"), "{error}");
}
