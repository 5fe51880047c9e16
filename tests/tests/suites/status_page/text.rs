//! What users and the network can write is shown as text.

use serde_json::json;

use testkit::{eventually, eventually_equal};

use super::scene::Scene;

pub(super) fn hostile() {
    Scene::run(|scene| {
        // The kernel takes nearly anything for the name of an interface.
        let mut web = scene.web("web", 8001);
        web["limits"] = json!({ "device": "<u>x" });
        scene.serve(&[web]);
        scene.browser.click("#view-mappings .row a");
        eventually("the interface", || scene.browser.text("#details").contains("<u>x"));
        // So can an address of the page that somebody is led to.
        scene.browser.run("location.hash = 'mapping=' + encodeURIComponent('<u>y</u><img src=x>')");
        eventually_equal("title", &"<u>y</u><img src=x>".to_owned(), || scene.browser.text("#details-name"));
        scene.browser.run("location.hash = 'mapping=%zz'");
        eventually_equal("title", &"%zz".to_owned(), || scene.browser.text("#details-name"));
        assert_eq!(scene.browser.run("return document.querySelectorAll('u, img').length"), 0);
        assert_eq!(scene.problems(), Vec::<String>::new());
        assert_refused(scene);
    });
}

/// Checks that the browser applies the policy of the page. Each refusal is written to the console.
#[track_caller]
fn assert_refused(scene: &Scene) {
    let error =
        scene.browser.run("try { document.body.innerHTML = '<u>z'; } catch (error) { return error.name }");
    assert_eq!(error, "TypeError", "text became markup");
    let refused = [
        (
            "a script",
            "const script = document.createElement('script'); script.textContent = 'window.ran = 1'; document.body.append(script)",
        ),
        (
            "a style",
            "const style = document.createElement('style'); style.textContent = '* { color: red }'; document.head.append(style)",
        ),
        ("another origin", "fetch('http://127.0.0.2:9/').catch(() => 0)"),
        ("an image", "const image = new Image(); image.src = '/x.png'; document.body.append(image)"),
    ];
    for (what, script) in refused {
        scene.browser.console();
        // Trusted Types refuse the script at once, the policy what they let through.
        scene.browser.run(&format!("try {{ {script} }} catch (error) {{ console.warn(String(error)) }}"));
        eventually(what, || {
            scene.problems().iter().any(|problem| {
                problem.contains("Content Security Policy") || problem.contains("TrustedScript")
            })
        });
    }
    assert_eq!(scene.browser.run("return window.ran ?? null"), json!(null));
    scene.browser.console();
}
