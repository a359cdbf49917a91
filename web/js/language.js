// The language of the page, for what ComfyUI does not translate by itself.

import { app } from "../../../scripts/app.js";

/** "zh", "en", ...: ComfyUI's setting. */
export function language() {
  return app.extensionManager.setting.get("Comfy.Locale") ?? "en";
}
