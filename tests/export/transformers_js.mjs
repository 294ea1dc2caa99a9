// Embed a picture and texts by transformers.js: node transformers_js.mjs MODULES FOLDER NAME PICTURE TEXTS
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, folder, name, picture, texts] = process.argv.slice(2);
const entry = createRequire(path.join(modules, "package.json")).resolve("@huggingface/transformers");
const library = await import(pathToFileURL(entry));
const js = library.default ?? library;
js.env.allowRemoteModels = false;
js.env.localModelPath = folder + "/";
const vision = await js.CLIPVisionModelWithProjection.from_pretrained(name, { dtype: "fp32" });
const text = await js.CLIPTextModelWithProjection.from_pretrained(name, { dtype: "fp32" });
const processor = await js.AutoProcessor.from_pretrained(name);
const tokenizer = await js.AutoTokenizer.from_pretrained(name);
const { image_embeds } = await vision(await processor(await js.RawImage.read(picture)));
const listed = JSON.parse(fs.readFileSync(texts));
const { text_embeds } = await text(tokenizer(listed, { padding: true, truncation: true }));
console.log(JSON.stringify({ image: image_embeds.tolist(), text: text_embeds.tolist() }));
